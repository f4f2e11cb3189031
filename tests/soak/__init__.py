"""The long check behind `make soak`: trainings killed, stopped, damaged, fed with what is broken or malicious."""

import os

os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
