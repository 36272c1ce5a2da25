"""python -m noisysam"""

from noisysam.cli import main

main()
