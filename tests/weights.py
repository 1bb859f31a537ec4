"""How many bytes a model's weights take."""

import torch
from torch import nn


def weight_bytes(built: nn.Module) -> int:
    """Bytes of distinct storage that the model's weights take, packed or not."""
    storages = {}
    for module in built.modules():
        for holder in (module, *vars(module).values()):
            for tensor in vars(holder).values() if hasattr(holder, "__dict__") else ():
                if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                    storages[tensor.untyped_storage().data_ptr()] = (
                        tensor.untyped_storage().nbytes()
                    )
        packed = getattr(module, "packed", None)
        if packed is not None:
            pack = packed.pack
            storages[id(pack) if pack.data.is_mkldnn else pack.data.data_ptr()] = pack.nbytes
        for parameter in module.parameters(recurse=False):
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
