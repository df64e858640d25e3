import torch

# The layers here are so small that a second thread only costs.
torch.set_num_threads(1)
