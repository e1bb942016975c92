"""Where the label maps of a synthetic set come from: cases or fresh phantoms, as they are or
edited; a label generator; scans without labels, which a segmenter labels. Each source gives
Recipes.
"""
import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import brainsyn as bs
from kit import checks, edits, nifti, phantoms, requests, runs, slices, writing


FRESH = 500_000                 # phantoms whose label maps are used have seeds from this one on
LABEL_GUIDANCE = 2.0            # guidance scale of the label generator
OUTLINES = 8                    # phantoms whose outlines label maps without scans are drawn into
BRATS_SIZE = (155.0, 240.0, 240.0)      # mm along D, H, W: the volume of every BraTS release
# mm from the first slice, row and column: the centre of the brain there, within 4 mm in 33 cases.
BRATS_CENTRE = (72.0, 128.0, 119.5)


@dataclass
class Recipe:
    """What one synthetic case is made of.

    key      (seed, number of the case), from which all random numbers follow
    facts    what its sidecar says of the label map
    case     the Case that gives scans, brain and tumour
    edit     how the tumour is changed, see edits.edit_labels; prepare sets the scale for `target`
    target   (label or region, mL): the tumour is scaled until this volume is right
    model    the LabelGenerator that makes the label map, in place of a case
    request  what it is asked for, float (E,)
    classes  a label map without scans in some outline, int (D, R, R), in place of a case; facts
             hold the hashes of both
    """
    key: tuple
    facts: dict
    case: nifti.Case | None = None
    edit: dict = field(default_factory=dict)
    target: tuple = ()
    model: requests.LabelGenerator | None = None
    request: torch.Tensor | None = None
    classes: torch.Tensor | None = None

    def prepare(self, resolution, fov, condition):
        """Label map, outline and scans on the model's grid, as slices.prepare_case returns them;
        where the label map is generated or has no scans, what requests.prepare_labels returns."""
        if self.case:
            return slices.prepare_case(self.case, resolution, fov, condition, self.relabel)
        if self.classes is not None:
            step = fov / resolution
            prepared = requests.prepare_labels(self.classes, "tumour", step, resolution, fov,
                                               condition)
            return prepared | {"hashes": tuple(self.facts[name] for name in writing.ORIGIN)}
        classes = requests.sample_labels(self.model, self.request, (*self.key, "labels"),
                                         {**requests.SETTINGS, "guidance": LABEL_GUIDANCE})
        return requests.prepare_labels(classes, self.model.condition, self.model.step, resolution,
                                       fov, condition)

    def relabel(self, labels, brain, affine):
        """Labels, outline and affine of `case` -> labels of the synthetic case, on that grid."""
        seed = [*self.key, 3]
        if not self.target:
            return edits.edit_labels(labels, affine, brain, self.edit, np.random.default_rng(seed))
        labels, self.edit = edits.edit_to_volume(labels, affine, brain, *self.target, self.edit,
                                                 seed)
        return labels


def cases_of_part(args, folder):
    """The real cases in a folder, of --part alone where it is given: the parts that training had,
    for which the folder is checked as training checks it."""
    cases = nifti.find_cases(folder) if not args.skip_bad else []
    artificial = all(phantoms.phantom_seed(case.case) is not None for case in cases)
    if args.skip_bad or args.part and not artificial:
        memory = Path(args.checkpoint).parent / "cache"
        cases = checks.usable_cases(folder, args.skip_bad, memory if memory.is_dir() else None)
    checks.refuse_synthetic(cases)
    if args.part:
        cases = slices.split_patients(cases, args.split)[args.part]
    if not cases:
        raise bs.BadInput(f"{folder}: no case is in part {args.part}; choose another --part")
    return cases


def read_label_maps(folder, outlines, step, seed=0):
    """Label maps that come without scans: every .nii and .nii.gz at any depth below `folder`,
    labels 0, 1 NCR, 2 ED, 3 or 4 ET on any grid. They show no brain: each gets the outline of one
    of `outlines`, classes uint8 (M, D, R, R), cubic voxels of `step` mm, drawn at random. Returns

    volumes   uint8 (N, D, R, R), classes of the condition "tumour"
    names     [name of the file without .nii.gz]
    hashes    [the hash of the labels, see case_hashes]
    lost      fraction of all tumour voxels that lay outside the outline and were cut off

    The middle of the outline's volume is put on the centre of the map's own volume, whatever origin
    its affine has. A volume of 240 x 240 x 155 mm (within 2 mm) is taken for one of BraTS, in which
    the brain has its centre at BRATS_CENTRE. BadInput names a file that cannot be read or holds
    other values, and a folder without such files.
    """
    paths = sorted([*Path(folder).rglob("[!.]*.nii"), *Path(folder).rglob("[!.]*.nii.gz")])
    if not paths:
        raise bs.BadInput(f"{folder}: holds no label map; expected NIfTI files (.nii.gz or .nii)")
    order = torch.randint(len(outlines), (len(paths),), generator=bs.generator(seed, "outlines"))
    brains, maps, hashes = outlines[order] > 0, [], []
    for path, brain in zip(paths, brains):
        labels, affine = nifti.read_labels(nifti.Case(path.name, {"seg": path}))
        hashes.append(slices.case_hashes(labels, brain.numpy())[0])
        labels, spacing = slices.to_slices(labels), nifti.spacing_of(affine)[::-1]  # along D, H, W
        size = spacing * labels.shape
        centre = BRATS_CENTRE if np.abs(size - BRATS_SIZE).max() < 2 else size / 2
        matrices = [slices.area_weights(n_in, n_out, (at - n_out * step / 2) / mm, step / mm)
                    for n_in, n_out, at, mm in zip(labels.shape, brain.shape, centre, spacing)]
        maps.append(torch.from_numpy(requests.resample(labels, len(bs.LABELS) + 1, matrices)))
    labels = torch.stack(maps)
    volumes = brains * (labels + 1)
    lost = 1 - int((volumes > 1).sum()) / max(int((labels > 0).sum()), 1)
    return volumes, [path.name.split(".nii")[0] for path in paths], hashes, lost


def only_label_maps(folder):
    """True if a folder holds NIfTI files and none of them is a scan."""
    paths = nifti.list_files(Path(folder), [])
    named = nifti.sort_by_name(folder, paths, True, [])
    kinds = {kind for parts in named.values() for kind, _ in parts}
    return (kinds <= {"seg"} and any(".nii" in path.name for path in paths)
            and not any((path.parent / "imagesTr").is_dir() for path in paths))


def label_maps_alone(args, state, scratch):
    """Recipes from the label maps of --labels, which come without scans, in outlines of phantoms
    that are written into the folder `scratch`."""
    if args.edit or args.balance or args.part or state["condition"] == "tissue":
        raise bs.BadInput(f"{args.labels}: label maps without scans; they are used as they are, "
                          "with the condition tumour")
    phantoms.make_phantoms(scratch, OUTLINES, state["args"]["scanner"])
    size, fov = state["resolution"], state["fov"]
    with contextlib.redirect_stdout(io.StringIO()):
        cache = slices.build_cache(nifti.find_cases(scratch), scratch, size, fov, "tumour")
    outlines = requests.label_volumes(cache, slices.PARTS, size * 3 // 4)
    maps, _, hashes, lost = read_label_maps(args.labels, outlines, fov / size, args.seed)
    print(f"label maps: {len(maps)} without scans, drawn into outlines of phantoms, which cut off "
          f"{lost:.1%} of the tumours")
    for number in range(args.count):
        at = number % len(maps)
        origin = hashes[at], slices.case_hashes(np.zeros(1), maps[at].numpy() > 0)[1]
        facts = {"LabelMaps": "label maps alone", "Outlines": "phantoms", "Edits": {},
                 "RequestedML": {}, **dict(zip(writing.ORIGIN, origin))}
        yield Recipe((args.seed, number), facts, classes=maps[at].long())


def edited_cases(args, scanner, scratch):
    """Recipes from the cases of --labels, or from fresh phantoms of this scanner, which are written
    into the folder `scratch`; edited and balanced as asked. BadInput if no case shows what
    --balance asks for."""
    def fresh(number):
        return nifti.find_cases(phantoms.write_phantom(scratch, FRESH + number, scanner))[0]

    cases = cases_of_part(args, args.labels) if args.labels else []
    if args.balance:
        cases = cases or [fresh(number) for number in range(args.count)]
        volumes = [edits.volume_ml(*nifti.read_labels(case), args.balance) for case in cases]
        shown = [ml for ml in volumes if ml > 0]
        if not shown:
            raise bs.BadInput(f"no label map shows {args.balance} (--balance); use other cases")
        low, high = args.range or (min(shown), max(shown))
    order = np.random.default_rng(args.seed).permutation(len(cases))
    for number in range(args.count):
        case = cases[order[number % len(cases)]] if cases else fresh(number)
        recipe = Recipe((args.seed, number), {"LabelMaps": "cases" if args.labels else "phantoms"},
                        case, args.edit)
        if args.edit == ["random"]:
            recipe.edit = edits.random_edit(np.random.default_rng([*recipe.key, 1]))
        if args.balance:
            ml = round(edits.balanced_target(number, args.count, low, high), 2)
            rng = np.random.default_rng([*recipe.key, 2])
            recipe.case = cases[edits.pick_for_volume(volumes, ml, rng)]
            recipe.target = args.balance, ml
        asked = {args.balance: recipe.target[1]} if args.balance else {}
        recipe.facts |= {"Edits": recipe.edit, "RequestedML": asked}
        yield recipe


def requested_labels(args, device, state):
    """Recipes of label maps that are generated as --request asks, for the image generator with
    checkpoint `state`. BadInput where --label-checkpoint cannot serve both."""
    model = requests.load_label_generator(args.label_checkpoint, device)
    requests.require_condition(model.condition, state["condition"])
    if "ventricles" in args.request and state["condition"] != "ventricles":
        raise bs.BadInput("--request ventricles: train both networks with --condition ventricles")
    for number in range(args.count):
        request = requests.requested(args.request, number, args.count, args.seed)
        wanted = dict(zip(requests.entries(), request.tolist()))
        asked = {name: round(wanted[name], 2) for name in args.request}
        volumes = *bs.LABELS, "ventricles"
        facts = {"LabelMaps": "generated", "Edits": {}, "Requested": asked,
                 "RequestedML": {name: ml for name, ml in asked.items() if name in volumes},
                 "LabelGuidance": LABEL_GUIDANCE, "LabelGeneratorPatients": model.state["patients"],
                 "LabelCheckpointSHA256": model.state["digest"]}
        yield Recipe((args.seed, number), facts, model=model, request=request)


def segmented_scans(args, device, scratch):
    """Recipes from the scans of --scan and the label maps that --segmenter predicts for them, which
    are written into the folder `scratch`; labels that lie beside the scans are not read."""
    segmenter = runs.load_segmenter(args.segmenter, device)
    for number, case in enumerate(nifti.find_cases(args.scan, labelled=False)):
        case.files.pop("seg", None)
        prepared = slices.prepare_case(case, segmenter.resolution, segmenter.fov, "tumour")
        path = Path(scratch) / f"{number}.nii.gz"
        nifti.write_labels(path, segmenter.segment(prepared), case, prepared["grid"].affine)
        same = {k: k for k in range(1, len(bs.LABELS) + 1)}
        labelled = case._replace(files={**case.files, "seg": path}, values=same)
        yield Recipe((args.seed, number), {"LabelMaps": "segmented",
                                           "SegmenterSHA256": segmenter.digest}, labelled)


def recipes_of(args, device, state, scratch):
    """The Recipes of all cases of a set, one by one, for the image generator with checkpoint
    `state`. args: of sample.py; scratch: a folder for what is needed meanwhile."""
    if args.request is not None:
        return requested_labels(args, device, state)
    if args.scan:
        return segmented_scans(args, device, scratch)
    if args.labels and only_label_maps(args.labels):
        return label_maps_alone(args, state, scratch)
    return edited_cases(args, state["args"]["scanner"], scratch)
