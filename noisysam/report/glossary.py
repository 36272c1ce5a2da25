"""The words of a report that its readers may not know."""

from noisysam.report.document import Section
from noisysam.report.tables import percent
from noisysam.runs.summary import COLLAPSED

GLOSSARY = {
    "m": "rows that share one perturbation of SAM; batch: one perturbation for the whole batch",
    "rho": "radius of the perturbation of SAM, an L2 norm over all weights",
    "nominal rate": "share of the training labels that are drawn anew; flip rate: share that is wrong afterwards",
    "blind": "nothing in the run depends on the true noise, on clean labels or on the test set",
    "oracle": "something does: what a user would not have known; always marked",
    "selected": "the epoch that is best on held-out images with their noisy labels",
    "memorised": "share of the wrongly labelled training images for which the network predicts the wrong label given",
    "recovered": "share of the wrongly labelled training images for which it predicts the true class",
    "collapsed": f"the network predicts one class for at least {percent(COLLAPSED)} % of the test images",
    "earlier revision": "trained before the method or the optimizer was changed to do what its authors' code does",
}


def section() -> Section:
    """The glossary as a section."""
    return Section("Glossary", lines=[f"{word}: {meaning}" for word, meaning in GLOSSARY.items()])
