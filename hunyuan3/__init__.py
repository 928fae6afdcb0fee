"""HunyuanImage-3.0 (base, Instruct, Instruct-Distil) as plain PyTorch modules; nothing here knows ComfyUI.

Reading order, the way the data goes:

1. `checkpoint/`   folder -> tensors (index, names, load)
2. `transformer/`, `moe/`, `vae/`   the networks, single-device, no file access
3. `text/`, `image/`   prompt and sizes -> token sequence
4. `generate/`   the loops: schedule, guidance, denoise, step cache
5. `pipeline.py`   the handle that owns the parts
"""
