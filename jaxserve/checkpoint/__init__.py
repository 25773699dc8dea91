"""From a Hugging Face folder to a tree of weights on a device."""
