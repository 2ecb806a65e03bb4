import os

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers take the other processors
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import kvgen as kvgen  # before torch: it says how torch's threads wait
