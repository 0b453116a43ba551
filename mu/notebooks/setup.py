"""What several notebooks of the walk do alike: read a concept's folder, carry a run out once, measure it once, tabulate, compare."""

import pandas as pd
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

diffusers_logging.disable_progress_bar()  # those of reading files; the ones of training stay
transformers_logging.disable_progress_bar()
pd.set_option("display.max_colwidth", None)
pd.set_option("display.precision", 3)
