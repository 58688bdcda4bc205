import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # PyTorch reads it when it is imported, so it has to be set before

__version__ = "0.1.0"
