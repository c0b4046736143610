"""Checkpoints larger than memory: read a piece at a time, quantized, and written to the same bytes as in memory.

source.py reads, plan.py decides, shards.py writes, journal.py remembers what is done, work.py runs it, verb.py is the whole.
"""
