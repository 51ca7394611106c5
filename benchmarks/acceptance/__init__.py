"""The parts of benchmarks/gpu_acceptance.py, each a process of its own.

rows.py       a row of the table, where a part leaves it, and a part's command line
attention.py  kernels against float64, speed against FlashAttention, decoding
training.py   a text, 100 steps, memory, ZeRO-3, int4 and fp8
"""
