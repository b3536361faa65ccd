"""MoDA, row 4: `tiny.py` under the name that its row has in the table of docs/reproduce.md.

Command:  python train.py configs/tiny_moda.py
Cost:     1,401 tokens/s on one core of a server's CPU (measured, median of three runs side by
          side): 5 minutes there, compilation excluded
Expected: final validation loss 2.20 to 2.28 nats a byte (measured as tiny.py, seeds 0, 1, 2)
"""

import dataclasses

from configs.tiny import config as tiny

config = dataclasses.replace(tiny, name="tiny_moda")
