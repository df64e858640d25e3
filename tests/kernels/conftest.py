import os

# Read by Triton when it is imported, which only the kernels do, and only when asked for.
os.environ["TRITON_INTERPRET"] = "1"
