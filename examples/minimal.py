import torch

from cmim_kernels import fused_cmi_loss

logits, target = torch.randn(256, 1000, requires_grad=True), torch.randint(32, (256,))
loss = fused_cmi_loss(logits, target, cmi_weight=10.0)  # instead of F.cross_entropy(logits, target)
loss.backward()
