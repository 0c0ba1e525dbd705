"""Give libvirt's domains their vmnet addresses: `domain` reads what libvirt tells, `hook` is what libvirt calls."""
