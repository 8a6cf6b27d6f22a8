"""The two tuning stages: DeepSpeed engine, training loop, checkpoints."""

import logging

# DeepSpeed warns of every machine without a GPU when it is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
