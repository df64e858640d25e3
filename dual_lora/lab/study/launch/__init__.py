"""Runs handed to a launcher of Hydra's: to processes of this machine, or to the jobs of a cluster.

Every launch has a folder of its own, removed when all its runs finished:

    runs/.multirun/WHEN_XXXX/
        N/config.yaml   the settings of run N, which its process reads, so that it does what was checked here
        N/run.json      its identity, and the settings that distinguish it from the others, which its process prints
        .submitit/JOB/  what a job of Slurm prints, and how submitit hands it over (pickles)
        command.json    which process the command is, because its runs on this machine stop when it is gone, and the
                        code and the folders of settings files that it named
        stop            made when the command is stopped: all runs of the launch then stop, wherever they are
"""
