"""Everything that has to be known from a GPU, in one command that ends by itself.

python -m experiments.gpu_suite                  (9 minutes; writes results/gpu_<device>_<section>.json)

``suite`` gives each section its share of the time and hands one case after the other to ``worker``, a process of its
own: a kernel that hangs or breaks the device costs its case and no other. The sections are ``correct``, ``attention``,
``operations``, ``training``, ``long`` and ``tune``.
"""
