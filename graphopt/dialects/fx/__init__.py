"""The graph over torch.fx: aten operations, functional, with the weights as stored tensors."""
