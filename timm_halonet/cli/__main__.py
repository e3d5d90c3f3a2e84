"""`python -m timm_halonet.cli`."""

import sys

from .main import main

sys.exit(main())
