"""When things run: DVC's graph walked by Prefect. `launch` is the door; the other modules import Prefect."""
