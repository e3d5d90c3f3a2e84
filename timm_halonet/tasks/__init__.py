"""Synthetic tasks that compare ways to attend: `python -m timm_halonet.tasks.organs` and `.paths`.

Each trains a few small models with one recipe and several seeds on data that it makes itself, and reports what came
out. Sized for a CPU.
"""
