"""How many bytes the tensors of this process take."""

import gc

import torch


def tensor_bytes() -> int:
    """Bytes of the distinct storages of all tensors that are alive."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.layout == torch.strided:
            if not each.is_meta:
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
