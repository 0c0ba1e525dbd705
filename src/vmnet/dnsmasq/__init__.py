"""Serve guests addresses by DHCP and names by DNS: dnsmasq does it, and vmnet tells it what.

`files` says what dnsmasq is to read, `keeper` is the small process that keeps it running and up to date, `processes`
finds and ends both, `answers` is what the engine calls.
"""
