"""The long check behind `make soak`: trainings killed, stopped, without room on the disk, and what is opened fuzzed."""

import os

os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
