"""`python -m timm_halonet`: the same as `timm-halonet`."""

import sys

from .cli import main

sys.exit(main())
