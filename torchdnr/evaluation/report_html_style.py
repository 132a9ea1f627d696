"""The frame of the report's page, and what its numbers mean."""

from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; }
tr:first-child th { border-bottom: 2px solid #999; vertical-align: bottom; }
.ci { color: #777; font-size: .85em; white-space: nowrap; }
.note { color: #555; max-width: 46rem; }
.mark { display: inline-block; border-radius: .3rem; padding: 0 .4rem; font-size: .8rem;
  font-weight: 600; white-space: nowrap; background: #e8e8e8; color: #444; }
.mark.fail { background: #a40000; color: #fff; } .mark.warn { background: #ffdb8a; color: #5a3d00; }
.mark.pass { background: #d8efdc; color: #0b4f1a; }
ul { padding-left: 0; list-style: none; margin: .3rem 0; }
li { padding: .15rem .6rem; border-left: .3rem solid #bbb; margin: .3rem 0; }
li.fail { border-color: #a40000; } li.warn { border-color: #e0a100; }
li.pass { border-color: #3a9a4f; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; }
pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")

EXPLANATIONS = {
    "worst": (
        "An attack succeeds on an image if the changed image is <b>accepted and wrong</b>. "
        "<b>Accuracy</b>: at eps = 0, without an attack, the share of images given their true "
        "class, and to reject is an error; beyond it the share given their true class or rejected. "
        "<b>Rejected</b>: the share that the classifier refuses to decide on. <b>Worst case</b>: "
        "for each image the most harmful of all attacks, at this and all smaller eps. "
        "<b>eps</b>: largest change allowed, in the norm of the attack, of pixels in [0, 1]. In "
        "brackets the 95 % confidence interval for the number of images. A number is an upper "
        "bound: a better attack can only lower it."
    ),
    "attacks": (
        "Accuracy in percent if this were the only attack, in brackets the share rejected. The "
        "worst case is lower than the best of them where they succeed on different images."
    ),
    "clean": (
        "On all test images, none of them attacked. A rejected image counts as an error. "
        "<b>theta</b>: an image is rejected if its best score is not above it."
    ),
    "detection": (
        "How well the best score tells attacked from clean images. Counted are attacked images "
        "whose best score is that of a wrong class, accepted or not, and clean images whose best "
        "score is that of the true one. <b>AUROC</b>: probability that the attacked one of two "
        "images is the more suspicious; 0.5 is chance. <b>FPR95</b>: share of clean images "
        "rejected by a threshold that rejects 95 % of the attacked ones; lower is better. "
        "<b>Detected</b> and <b>false rejections</b>: share of attacked and of clean images "
        "rejected at the classifier's own theta. <b>Robust error</b>: of the images accepted, "
        "clean or attacked, the share accepted and wrong, at its own theta, or at the one that "
        "accepts 99 % of the right calibration images. A dash: there is none to count."
    ),
}
