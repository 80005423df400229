"""Operators of a CPU: C++ for x86 with AVX2 or AVX-512, weights laid out for the vendor library, products of 8 bits."""
