"""Text, tokenizers and model presets that the benchmark and the examples share; needs transformers and tokenizers."""
