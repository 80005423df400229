"""CPU operators: C++ for x86 with AVX2 or AVX-512, weights laid out for the vendor library, 8-bit products."""
