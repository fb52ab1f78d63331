"""Writers of the official dataset files that `readers` read: what the embedded world's tasks are stored in."""
