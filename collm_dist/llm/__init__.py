"""The language model: backbone, LoRA, mapping, and the shared-context forward pass."""
