"""The one seam for weights and whole passes at inference: laid out, joined, in 8 bits, in one call, recorded."""
