"""vmnet gives local VMs and containers addresses in 127/8, which no LAN can ever take."""

__version__ = "0.1.0"
