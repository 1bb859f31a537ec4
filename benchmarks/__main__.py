"""python -m internvl_engine.benchmarks: see kernels.py."""

from .kernels import main

raise SystemExit(main())
