// The browser's camera: open it, draw a frame on a canvas, compress it as JPEG, send it to the kernel, and wait.
// The kernel's side is `Camera` in nbs/06b_browser_parts.ipynb.

const WORDS = {  // what getUserMedia throws, or we do -> state, words
  NotAllowedError: ["refused",
    "The browser was not allowed to use the camera. Click the camera sign beside the address, allow it, and start again."],
  NotFoundError: ["absent",
    "No camera was found. Plug one in and start again, or choose another source: a video file, or \"synthetic\"."],
  NotReadableError: ["taken",
    "The camera does not answer; another program may be using it. Close that program and start again."],
  Insecure: ["insecure",
    "This page came over plain http, and browsers give cameras to https and localhost only. Open it over https, or as " +
    "http://localhost:PORT through a tunnel: ssh -L PORT:localhost:PORT HOST"],
  Unplugged: ["ended", "The camera went away. Plug it in and start again."],
  Silent: ["silent",
    "The kernel has not answered for 30 s, so the camera was turned off. Start again when the kernel is free."],
};
const SILENCE = 30_000;  // ms without an answer of the kernel

function inWords(error) {
  const other = `The camera could not be opened: ${error.message || error.name}. Start again, or try another browser.`;
  return WORDS[error.name] ?? ["failed", other];
}

function makeCamera(model) {  // one camera a model, however many views show it
  const page = crypto.getRandomValues(new Uint32Array(1))[0];
  const video = Object.assign(document.createElement("video"), {muted: true, playsInline: true});
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  const camera = {stream: null, rate: 0, onchange: new Set()};
  const changed = () => camera.onchange.forEach(f => f());
  let sent = 0, taken = 0;  // numbers of frames: the last one sent, the last one that the kernel took
  let due = 0, heard = 0;  // ms: when the next frame may go, when the kernel last answered
  let drawing = false, turn = 0, shots = [];

  // Opening and releasing. An answer that comes after its turn is over closes the camera again at once.

  function tell(state, message) {
    model.set("state", state);
    model.set("message", message);
    model.save_changes();
    changed();
  }

  function release() {
    turn++;
    camera.stream?.getTracks().forEach(track => { track.onended = null; track.stop(); });
    camera.stream = video.srcObject = null;
  }

  function stop(state = "off", message = "") {
    release();
    model.set("running", false);
    tell(state, message);
  }

  const fail = error => stop(...inWords(error));

  async function start() {
    release();
    const mine = turn, wish = name => ({ideal: model.get(name)});
    if (!navigator.mediaDevices?.getUserMedia) return fail({name: "Insecure"});
    tell("asking", "The browser asks whether this page may use the camera.");
    try {
      const stream = await navigator.mediaDevices.getUserMedia({audio: false, video: {width: wish("width"), height: wish("height")}});
      if (mine !== turn) return stream.getTracks().forEach(track => track.stop());  // stopped while the browser asked
      taken = sent;  // what was never answered is not waited for any more
      heard = due = performance.now();
      shots = [];
      camera.stream = video.srcObject = stream;
      stream.getVideoTracks()[0].onended = () => fail({name: "Unplugged"});
      await video.play();
      if (mine === turn) tell("live", "");
    } catch (error) {
      if (mine === turn) fail(error);
    }
  }

  // Sending. No more frames are under way than the kernel is willing to take.

  const stuck = () => sent - taken >= model.get("in_flight");

  function draw() {
    const width = Math.min(model.get("width"), video.videoWidth);
    const height = Math.round(width * video.videoHeight / video.videoWidth);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    const mirror = model.get("mirror");
    context.setTransform(mirror ? -1 : 1, 0, 0, 1, mirror ? width : 0, 0);
    context.drawImage(video, 0, 0, width, height);
  }

  function shoot(now) {
    draw();
    drawing = true;
    canvas.toBlob(async blob => {
      const buffer = await blob?.arrayBuffer();
      drawing = false;
      if (!buffer || !camera.stream) return;
      model.send({kind: "frame", page, index: ++sent, time: now}, undefined, [buffer]);
      shots = [...shots.filter(at => now - at < 2000), now];
      camera.rate = shots.length > 1 ? 1000 * (shots.length - 1) / (now - shots[0]) : 0;
    }, "image/jpeg", model.get("quality"));
  }

  function consider() {  // a frame is at hand: may it be sent?
    const now = performance.now(), step = 1000 / model.get("fps");
    if (!camera.stream) return;
    if (stuck()) {
      if (now - heard > SILENCE) fail({name: "Silent"});
      return;
    }
    if (drawing || now < due - 8 || video.readyState < 2) return;
    due = Math.max(due + step, now);  // what was late by less than a step is caught up, and no more
    shoot(now);
  }

  // Where the browser tells of each new frame, no frame is sent twice; but it tells only while the page is seen. Elsewhere a clock does.
  const told = video.requestVideoFrameCallback !== undefined;
  const onFrame = () => { consider(); video.requestVideoFrameCallback(onFrame); };
  if (told) video.requestVideoFrameCallback(onFrame);
  const clock = setInterval(() => { if (!told || document.hidden || stuck()) consider(); }, told ? 500 : 15);
  const pulse = setInterval(() => { if (camera.stream) changed(); }, 500);

  model.on("msg:custom", message => {
    if (message.kind !== "ack") return;
    taken = message.through;
    heard = performance.now();
  });
  model.on("change:running", () => {
    if (model.get("running")) start();
    else if (camera.stream || model.get("state") === "asking") stop();
  });
  if (model.get("running")) start();
  camera.close = () => { clearInterval(clock); clearInterval(pulse); release(); };
  return camera;
}

// Showing: a lamp, words, a button, and the person herself where `preview` asks for it.

const cameras = new Map();  // by key

function initialize({model}) {
  const key = model.get("key"), camera = makeCamera(model);
  cameras.set(key, camera);
  return () => { camera.close(); cameras.delete(key); };
}

function render({model, el}) {
  const camera = cameras.get(model.get("key"));
  el.classList.add("fer-camera");
  el.innerHTML = `<video muted playsinline></video><div><span class="lamp"></span><span class="words"></span><button></button></div>`;
  const [video, words, button] = ["video", ".words", "button"].map(s => el.querySelector(s));

  function show() {
    const size = camera.stream?.getVideoTracks()[0].getSettings() ?? {};
    const on = `Camera on: ${size.width}×${size.height}, ${camera.rate.toFixed(1)} frames a second to the kernel`;
    el.dataset.state = model.get("state");
    video.hidden = !model.get("preview") || !camera.stream;
    video.style.width = `${model.get("preview")}px`;
    video.style.transform = model.get("mirror") ? "scaleX(-1)" : "";
    if (video.srcObject !== camera.stream) {
      video.srcObject = camera.stream;
      if (camera.stream) video.play().catch(() => {});
    }
    words.textContent = camera.stream ? on : model.get("message") || "Camera off";
    button.hidden = !model.get("button");
    button.textContent = model.get("running") ? "Stop the camera" : "Start the camera";
  }

  button.onclick = () => { model.set("running", !model.get("running")); model.save_changes(); };
  for (const name of ["state", "message", "running", "preview", "button"]) model.on(`change:${name}`, show);
  camera.onchange.add(show);
  show();
  return () => camera.onchange.delete(show);
}

export default {initialize, render};
