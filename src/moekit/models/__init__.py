"""Models: one decoder, the rows of architectures it reads and writes, weights and tokenizers."""
