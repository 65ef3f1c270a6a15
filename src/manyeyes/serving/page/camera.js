// The camera, recognised live.
"use strict";

const CAMERA_PROBLEMS = {
  NotAllowedError: ["The camera may not be used.", "Allow it for this page in the browser's settings, then start it again."],
  NotFoundError: ["There is no camera.", "Connect one, then start it again."],
  NotReadableError: ["The camera can't be read.", "Another program may be using it."],
};

async function startCamera() {
  hideProblem();
  showNotice("");
  if (!navigator.mediaDevices) return showProblem(new Problem("The camera can't be used here.",
    "Browsers give it to pages over https or from localhost only."));
  const mine = camera = {stopped: false, stream: null};
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment", width: {ideal: 1280}}});
  } catch (error) {
    stopCamera();
    return showProblem(new Problem(...(CAMERA_PROBLEMS[error.name] ?? ["The camera did not start.", error.message])));
  }
  if (mine.stopped) return stream.getTracks().forEach(track => track.stop());
  mine.stream = stream;
  stream.getVideoTracks()[0].onended = () => { stopCamera(); showNotice("The camera was disconnected."); };
  entries.forEach(entry => URL.revokeObjectURL(entry.url));
  entries = [];
  current = null;
  lastRun++;
  element("main").classList.remove("busy");
  showStrip();
  hideExplanation();
  element("camera-text").textContent = "Stop the camera";
  element("camera-hint").textContent = "and keep the image";
  element("picture").hidden = element("why").hidden = element("hint").hidden = true;
  const video = element("video");
  video.srcObject = stream;
  video.hidden = false;
  await video.play().catch(() => {});
  live(mine, video);
}

/** One frame at a time: the next one is taken when the answer to the last is there, so that none can queue up. */
async function live(mine, video) {
  const canvas = document.createElement("canvas"), times = [];
  let said = "", saidAt = 0;
  while (!mine.stopped) {
    await new Promise(resolve => video.requestVideoFrameCallback ? video.requestVideoFrameCallback(resolve) : requestAnimationFrame(resolve));
    if (mine.stopped) return;
    const scale = Math.min(1, CAMERA_SIDE / Math.max(video.videoWidth, video.videoHeight));
    canvas.width = Math.round(scale * video.videoWidth);
    canvas.height = Math.round(scale * video.videoHeight);
    canvas.getContext("2d", {alpha: false}).drawImage(video, 0, 0, canvas.width, canvas.height);
    const started = performance.now();
    const frame = await new Promise(resolve => canvas.toBlob(resolve, "image/jpeg", 0.92));
    let answer;
    try {
      answer = await askRecognition(frame);
    } catch (problem) {
      if (!mine.stopped) { stopCamera(); showProblem(problem, startCamera); }
      return;
    }
    if (mine.stopped) return;
    const now = performance.now(), latency = now - started, [best] = answer.predictions;
    Object.assign(mine, {frame, answer, latency});
    times.push(now);
    while (times.length > 2 && now - times[0] > 2000) times.shift();
    const rate = times.length > 1 ? 1000 * (times.length - 1) / (now - times[0]) : 0;
    showAnswer(answer, true);
    element("rate").hidden = false;
    element("rate").textContent = `Live: ${rate.toFixed(1)} frames/s · ${milliseconds(latency)} latency`;
    const {decode, predict} = answer.timings_ms;
    element("caption").textContent = `Camera · ${video.videoWidth} × ${video.videoHeight}`;
    element("timing").textContent = `decode ${milliseconds(decode)} · predict ${milliseconds(predict)} · version ${answer.model.version}`;
    // A screen reader hears of a new class, not of every frame.
    if (best.class_name !== said && now - saidAt > 2000) { speak(said = best.class_name); saidAt = now; }
  }
}

function stopCamera() {
  if (!camera) return;
  const {stream, frame, answer, latency} = camera;
  camera.stopped = true;
  camera = null;
  stream?.getTracks().forEach(track => track.stop());
  element("video").srcObject = null;
  element("video").hidden = element("rate").hidden = true;
  element("camera-text").textContent = "Start the camera";
  element("camera-hint").textContent = "recognise live";
  if (!answer) return;
  const file = new File([frame], "Camera", {type: "image/jpeg"});
  current = {file, url: URL.createObjectURL(file), answer, roundTrip: latency, label: answer.predictions[0].label};
  entries = [current];
  show();
}
element("camera").onclick = () => camera ? stopCamera() : startCamera();
document.addEventListener("visibilitychange", () => {
  if (!document.hidden || !camera) return;
  stopCamera();
  showNotice("The camera was stopped because this tab was hidden.");
});
