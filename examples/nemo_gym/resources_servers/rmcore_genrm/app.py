"""What NeMo-Gym starts: a group server that speaks genrm_compare, by the configuration NeMo-Gym hands over."""

from rmcore.cli.nemo_gym import main

if __name__ == "__main__":
    main()
