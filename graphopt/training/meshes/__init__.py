"""One training on many devices, over torch.distributed: data, sharded, tensor and pipeline parallel.

A mesh belongs to the run, and no pass knows it: each process makes the same calls, and `Spread` tells the loop which
part of the module, of the batches and of the state this process has.
"""

from graphopt.training.meshes.evaluating import evaluated
from graphopt.training.meshes.mesh import Mesh, MeshSizes, opened
from graphopt.training.meshes.spreading import spread

__all__ = ["Mesh", "MeshSizes", "evaluated", "opened", "spread"]
