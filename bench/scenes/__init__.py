"""Training steps on emulated clusters: the peers and every mechanism of ours, in scenes that one table lists.

python -m bench.scenes                     # all of them: about 13 minutes on 2 quiet cores; needs root
python -m bench.scenes peers-100 ablation  # some

model.py     the model that all train, and the timed wait that can stand in for its computation
runtimes.py  a step under DDP, FSDP2, DeepSpeed or ours, by the name that tables show, and the bytes each one holds
work.py      what every rank runs: the variants of a scene take turns
limit.py     the shortest schedule that data dependencies allow, a pure function
table.py     the scenes
__main__.py  runs them, checks that all agree on the loss, and writes bench/results/cluster/
"""
