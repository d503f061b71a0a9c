"""`python -m dynlight.pretraining --config X.yaml`: makes a base model."""

import sys

from dynlight.pretraining.learning import main

sys.exit(main())
