"""The language model: backbone, adapter, mapping, and the engine that computes shared contexts once."""

import logging

# peft imports bitsandbytes, which warns on every start of a kernel that only 4-bit weights on CPUs would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
