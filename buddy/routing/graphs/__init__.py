"""Decoding by captured CUDA graphs. Experimental: no GPU has run its tests yet; they run its steps without graphs."""
