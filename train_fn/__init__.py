"""One trial: data, model, training loop, scores."""

import os

# MKL chooses its kernels anew in each process, by threads and addresses, and two runs of one trial would differ in the
# last bits now and then. Read at MKL's first computation; costs 0 to 5 % of a step on the nano base.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
