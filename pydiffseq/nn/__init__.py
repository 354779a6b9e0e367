"""Layers: plain ``nn.Module`` building blocks on top of :mod:`pydiffseq.ops`."""
