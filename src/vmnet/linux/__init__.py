"""The Linux edge: observe the kernel and carry out ops. No decision is made here."""
