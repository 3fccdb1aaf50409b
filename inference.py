"""A trained model made ready to generate: weights in a fast format, laid out for the processor."""

import torch
import torch.nn as nn

from device import cpu_has_bfloat16


class PackedLinear(nn.Module):
    """A linear layer, for inference on CPUs, whose weights lie in the order in which oneDNN's kernels read them.

    With a few rows of input, as in decoding, it reads weights near the memory's full bandwidth, where a plain
    layer is 2 to 4 times slower. An output row depends on its input row alone, bit for bit.
    """

    def __init__(self, linear):
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias
        # The layout for 16 rows serves 1 and 1,000 as well.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        rows = x.flatten(0, -2)
        if len(rows) == 1:
            rows = rows.expand(2, -1).contiguous()  # one row alone is summed in another order
        y = torch.ops.mkldnn._linear_pointwise.default(rows, self.weight, self.bias, "none", [], "")
        return y[: x[..., 0].numel()].view(*x.shape[:-1], self.out_features)


def inference_dtype(name, device):
    """The torch.dtype for weights by "auto" or a name. Auto: bfloat16 where the device multiplies it fast."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    fast = cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def prepare_for_inference(model, device, dtype):
    """A GPT on `device` with weights of `dtype`, in eval mode; on CPUs its linear layers become PackedLinear.

    It cannot be trained or saved any more.
    """
    model.requires_grad_(False).to(device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers, the tables of positions, stay float32
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))
    return model
