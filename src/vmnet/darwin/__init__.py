"""The macOS edge: aliases on lo0, by ifconfig. No decision is made here."""
