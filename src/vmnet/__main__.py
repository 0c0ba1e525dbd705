"""`python -m vmnet`: the command line, or what libvirt calls, which has no time for all that the former loads."""

import sys

if sys.argv[1:2] == ["libvirt-hook"]:
    from vmnet.libvirt.hook import main as hook

    sys.exit(hook(sys.argv[2:]))
else:
    from vmnet.cli import main

    main()
