"""Features of many photos in one Parquet file: Ray Data reads and computes, on one machine or on a cluster.

`sources.py` lists what there is to do, `pipeline.py` lets Ray do it, `parts.py` keeps what is done, `job.py` is a run.
"""

from .job import Job
from .pipeline import check_ray, session

__all__ = ["Job", "check_ray", "session"]
