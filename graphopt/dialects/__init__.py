"""The two graphs, torch.fx and onnx-ir, behind the interface of graphopt.ir.graph; `adapter` makes them."""
